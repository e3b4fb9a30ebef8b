"""Programs on top of lrules: ``train``, ``compare`` and ``benchmark``, and the library that they share."""
