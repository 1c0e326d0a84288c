"""decode.speculation"""
