"""measure.tasks"""
