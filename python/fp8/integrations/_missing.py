"""The error of an integration whose package is not there, or is another than the one it is for."""


def missing(integration: str, package: str, tested: str, error: ImportError) -> ImportError:
    """What to raise, from `error`. tested: the version that the integration is tested with."""
    return ImportError(
        f"{integration} needs the package {package} (tested with {tested}): {error}",
        name=error.name,
    )
