"""What is changed in a vendor's package, a file per package: each change with the release, its reason and its test.

A test in tests/patches/ fails where a release no longer needs a change, so an upgrade is reviewed here. Elsewhere:
policy/megatron/layers.py overrides `GPTModel._postprocess` in a subclass (hidden states come out, its attention is this
product's), and models/source.py gives a tokenizer instance the template's arguments.
"""
