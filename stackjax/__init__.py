"""Pretraining of language models that grow while they train.

    import stackjax as sj

    config = sj.load_config("configs/tiny.py")
    small, large = sj.expand(config)
    state, step = sj.init_state(config, small), sj.make_step(config, small)
    for batch in sj.batches(config, small, steps=50):
        state, metrics = step(state, batch)
    state = sj.grow_state(config, small, large, state)

Names load at first use, so `import stackjax` does not import JAX. `sj.growth` has the growth
operators, `sj.model` the functions `init`, `apply` and `logical_axes`.
"""

from stackjax.runtime.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
