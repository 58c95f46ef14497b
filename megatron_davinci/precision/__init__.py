"""Numbers of few bits: formats, rounding, scales and the recipes made of them, in plain torch on any device.

What is computed here is what hardware of such a format computes, held in fp32: a number of 4 bits is the fp32 number
that those bits stand for. So a recipe can be tried without the hardware, and compared with it where there is some.
"""
