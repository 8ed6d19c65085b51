"""How the embedded model is made: scenes and questions, their labels, and the training of each part.

``python -m demo_model.train`` trains it, ``python -m demo_model.evaluate`` evaluates it. The result lives in
``vflowopt/demo``.
"""
