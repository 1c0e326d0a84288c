"""judge.text"""
