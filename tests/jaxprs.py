"""Looking into traced programs."""

import jax


def products(jaxpr):
    """Every matrix product of a program, those inside its loops and calls included."""
    return [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]


def convolutions(jaxpr):
    """Every convolution of a program."""
    return [equation for equation in equations(jaxpr) if equation.primitive.name == "conv_general_dilated"]


def equations(jaxpr):
    """Every operation of a program, those inside its loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
