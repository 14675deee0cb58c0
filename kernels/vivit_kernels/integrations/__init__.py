"""Integrations, in the order in which accelerate() asks them: host package -> its files here, the special one first."""

HOSTS: dict[str, tuple[str, ...]] = {
    "transformers": ("transformers",),
    "diffusers": ("diffusers",),
    "torch": ("pytorch",),
}
