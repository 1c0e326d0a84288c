"""represent.text"""
