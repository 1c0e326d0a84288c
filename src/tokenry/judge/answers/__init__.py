"""judge.answers"""
