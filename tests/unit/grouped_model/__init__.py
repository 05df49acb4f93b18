"""The grouped products of `ops/gemm/gluon_sm90`, file by file and name by name, less the arithmetic.

Operations are those of `hopper_model`, rings and turns those of `test_channels`.
"""
