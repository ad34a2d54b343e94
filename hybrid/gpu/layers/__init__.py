"""The torch half of every kind of layer: `<kind>.py` here belongs to `hybrid/models/layers/<kind>.py`.

Each has two functions: `load`, which brings the weights of a half to the device, and `open_half`, which makes of them
what a step calls. `base.py` says what that is.
"""
