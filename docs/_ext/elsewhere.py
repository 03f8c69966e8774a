"""Links from signatures to the documentation of other packages.

The addresses of the few names that pvae's signatures use stand here, as the site is built without a network; names are
those that Python reports, which are not always those of the page.
"""

from docutils import nodes

TORCH = "https://docs.pytorch.org/docs/stable/"
PYRO = "https://docs.pyro.ai/en/stable/"
NUMPY = "https://numpy.org/doc/stable/reference/generated/"
PYTHON = "https://docs.python.org/3/library/"
ADDRESSES = {
    "torch.Tensor": f"{TORCH}tensors.html#torch.Tensor",
    "torch.Size": f"{TORCH}size.html#torch.Size",
    "torch.device": f"{TORCH}tensor_attributes.html#torch.device",
    "torch.dtype": f"{TORCH}tensor_attributes.html#torch.dtype",
    "torch.nn.modules.module.Module": f"{TORCH}generated/torch.nn.Module.html",
    "torch.nn.modules.container.ModuleList": f"{TORCH}generated/torch.nn.ModuleList.html",
    "torch.nn.modules.container.Sequential": f"{TORCH}generated/torch.nn.Sequential.html",
    "torch.utils.data.dataset.Dataset": f"{TORCH}data.html#torch.utils.data.Dataset",
    "torch.utils.data.dataloader.DataLoader": f"{TORCH}data.html#torch.utils.data.DataLoader",
    "torch.distributions.distribution.Distribution": f"{TORCH}distributions.html#distribution",
    "torch.distributions.transforms.Transform": f"{TORCH}distributions.html#torch.distributions.transforms.Transform",
    "torch.optim.optimizer.Optimizer": f"{TORCH}optim.html#torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler": f"{TORCH}generated/torch.optim.lr_scheduler.LRScheduler.html",
    "pyro.distributions.torch_distribution.TorchDistribution": f"{PYRO}distributions.html#torchdistribution",
    "pyro.infer.SVI": f"{PYRO}inference_algos.html#pyro.infer.svi.SVI",
    "pyro.infer.SVI.step": f"{PYRO}inference_algos.html#pyro.infer.svi.SVI.step",
    "pyro.infer.SVI.evaluate_loss": f"{PYRO}inference_algos.html#pyro.infer.svi.SVI.evaluate_loss",
    "pyro.infer.elbo.ELBO": f"{PYRO}inference_algos.html#pyro.infer.elbo.ELBO",
    "pyro.optim.optim.PyroOptim": f"{PYRO}optimization.html#pyro.optim.optim.PyroOptim",
    "numpy.ndarray": f"{NUMPY}numpy.ndarray.html",
    "numpy.dtype": f"{NUMPY}numpy.dtype.html",
    "Axes": "https://matplotlib.org/stable/api/_as_gen/matplotlib.axes.Axes.html",
    "pandas.DataFrame": "https://pandas.pydata.org/docs/reference/api/pandas.DataFrame.html",
    "xarray.Dataset": "https://docs.xarray.dev/en/stable/generated/xarray.Dataset.html",
    "xarray.DataTree": "https://docs.xarray.dev/en/stable/generated/xarray.DataTree.html",
    "arviz.InferenceData": "https://python.arviz.org/en/stable/api/generated/arviz.InferenceData.html",
    "os.PathLike": f"{PYTHON}os.html#os.PathLike",
    "pathlib.Path": f"{PYTHON}pathlib.html#pathlib.Path",
    **{
        f"collections.abc.{name}": f"{PYTHON}collections.abc.html#collections.abc.{name}"
        for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")
    },
}


def link(app, env, node, contnode):
    """Makes a link of a name that is no name of pvae's."""
    address = ADDRESSES.get(node.get("reftarget"))
    if node.get("refdomain") != "py" or address is None:
        return None
    return nodes.reference("", "", contnode, refuri=address, internal=False)


def setup(app):
    app.connect("missing-reference", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
