"""decode.reasoning"""
