"""select.heads"""
