"""The command line tools: ``python -m jepa_kit.tools.train_net``, which tools/train_net.py and jepa-train run too."""
