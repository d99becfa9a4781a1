"""Real guard models as classifiers: any chat guard behind an OpenAI-compatible server, or loaded into this process.

``families`` knows how each guard is asked, ``parsing`` how its answer is read, ``base`` what verdict follows;
``http`` and ``local`` get the answer. ``local`` is the only module of the safety service that needs torch.
"""
