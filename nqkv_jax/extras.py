"""Packages that only some features need, by the names of this package's extras."""


def missing(what: str, package: str, extra: str) -> str:
    """What an ImportError says: `what` needs a package, and how it is installed."""
    # No index has nqkv-jax: its extras come from a checkout.
    return (
        f'{what} needs the package {package}: pip install -e ".[{extra}]" in a checkout of nqkv-jax'
    )
