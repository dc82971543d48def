"""What a front may be made of: layers and calls that keep nothing, draw nothing and ask nothing of data.

A client's own batch goes through them as it does through the module itself, so all that they change is
the place in memory; the trial would tell where that mattered.
"""

import operator

import torch
import torch.nn.functional as F
from torch import nn

MODULES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.Embedding, nn.Flatten, nn.Unflatten, nn.Identity, nn.Upsample, nn.PixelShuffle,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.GLU,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
    nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.LogSigmoid,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.LocalResponseNorm,
    nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReplicationPad1d, nn.ReplicationPad2d,
)  # fmt: skip
"""Layers that keep nothing and draw nothing: a client's own batch is given to them as it is."""

CALLS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.prelu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.glu,
    F.tanh, torch.tanh, F.sigmoid, torch.sigmoid, F.softplus, F.hardtanh, F.hardswish, F.hardsigmoid,
    F.softmax, torch.softmax, F.log_softmax, torch.log_softmax, F.normalize, F.interpolate, F.pad,
    F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    torch.flatten, torch.cat, torch.stack, torch.chunk, torch.split, torch.squeeze, torch.unsqueeze,
    torch.permute, torch.transpose, torch.add, torch.sub, torch.mul, torch.div, torch.matmul, torch.bmm,
    torch.mean, torch.sum, torch.max, torch.amax, torch.clamp, torch.abs, torch.exp, torch.sqrt,
    operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow,
    operator.matmul, operator.getitem, getattr,
    "relu", "tanh", "sigmoid", "softmax", "log_softmax", "view", "reshape", "flatten", "unflatten",
    "permute", "transpose", "unsqueeze", "squeeze", "size", "contiguous", "chunk", "split", "mean", "sum",
    "max", "amax", "clamp", "abs", "exp", "sqrt", "pow", "add", "sub", "mul", "div", "matmul", "bmm",
}  # fmt: skip
"""Functions and methods of which the same can be said."""
