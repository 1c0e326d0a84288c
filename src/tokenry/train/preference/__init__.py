"""train.preference"""
