"""Growth: going from one spec to another without changing what the model computes.

`plan.py` turns the difference of two specs into operators, `operator.py` says what an operator is and applies a plan
tensor by tensor, `axes.py` says which tensors a longer axis touches, `options.py` has the choices of a stage, and every
other module holds the operators of one kind of size.
"""
