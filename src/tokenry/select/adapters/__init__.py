"""select.adapters"""
