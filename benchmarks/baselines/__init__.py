"""The same mathematics as ours, as a plain script of the field writes it: what `make bench` measures ours against.

Padded batches in the order of the data, logits of every place, one forward pass for each metric, the frozen reference model run
at every step, `generate` in fixed batches, one generation for each prefix.  Nothing is slowed down on purpose: torch's own
attention, autocast and inference mode are used as anybody would use them.  tests/test_baselines.py holds that the numbers are
the same.
"""
