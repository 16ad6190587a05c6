"""The sections of a configuration: every setting, declared once, with its default and help text.

No default is the paper's value unless its help text names the source.
"""
