"""select.cutters"""
