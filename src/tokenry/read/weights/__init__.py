"""read.weights"""
