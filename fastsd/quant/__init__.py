"""Quantisation: which layers run in int8 or fp8 and with which ranges (spec.py), found on real
denoising trajectories (calibrate.py, draws.py), as modules that run anywhere and that compilers
recognise (linear.py, apply.py); and weights that are only kept in int8 (weights.py). Knows no
pipeline, file or vendor.
"""
