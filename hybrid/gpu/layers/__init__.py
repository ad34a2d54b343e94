"""The torch half of every kind of layer: `<kind>.py` here belongs to `hybrid/models/layers/<kind>.py`.

Each has three functions: `load` brings the weights of a half to the device, `open_half` makes of them what a step
calls, `whole_shape` says whether it uses the attention that is chosen by measurement. `base.py` says what they return,
`mirrored.py` has what all attention shares.
"""
