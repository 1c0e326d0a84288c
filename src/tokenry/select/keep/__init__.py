"""select.keep"""
