"""decode.generation"""
