"""tokenize.text"""
