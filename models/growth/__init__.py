"""Growth: going from one spec to another without changing what the model computes.

`plan.py` diffs two specs into operators, `operator.py` says what an operator is and applies a plan tensor by tensor, and
every other module is one operator.
"""
