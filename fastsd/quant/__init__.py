"""Quantisation: which layers run in int8 and with which ranges (spec.py), found on real denoising
trajectories (calibrate.py), as modules that run anywhere and that compilers recognise (linear.py,
apply.py). Knows no pipeline, file or vendor.
"""
