"""What a suite file may say of timing: how it is done, and which nets are timed without having been trained."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Backend = Literal[
    "torch_dense",
    "torch_channels_last",
    "onnxruntime",
    "openvino",
    "mnn_dense",
    "torch_compacted",
    "onnxruntime_compacted",
    "openvino_compacted",
    "mnn_compacted",
    "mnn_sparse",
    "scipy_csr",
    "torch_csr",
    "sparse_dot_mkl",
    "im2col_scipy",
    "vdbench",
]
DENSE_BACKENDS: tuple[Backend, ...] = ("torch_dense", "torch_channels_last", "onnxruntime", "openvino", "mnn_dense")
NetName = Literal["lenet300100", "lenet5", "vgglike"]
_VGG_CONVOLUTIONS = ((1, 1), (1, 2), (2, 1), (2, 2), *((block, place) for block in (3, 4, 5) for place in (1, 2, 3)))
LAYERS: dict[NetName, tuple[str, ...]] = {
    "lenet300100": ("fc1", "fc2", "fc3"),
    "lenet5": ("conv1", "conv2", "fc1", "fc2"),
    "vgglike": (*(f"conv{block}_{place}" for block, place in _VGG_CONVOLUTIONS), "fc1", "fc2"),
}
RANDOM_MASKS = "random_masks"

Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
BatchSizes = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
Density = Annotated[float, Field(gt=0, le=1)]


def _takes_truth(kind: Any) -> bool:
    """Whether true or false may be a value of this kind."""
    return isinstance(kind, bool) or kind is bool or any(map(_takes_truth, get_args(kind)))


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        given = value if isinstance(value, list) else [value]
        if not _takes_truth(kind) and any(isinstance(each, bool) for each in given):
            raise ValueError("neither true nor false can be meant here; yes, no, on and off are read as these")
        return value


class Timing(Strict):
    """How inference is timed: contenders interleaved, in one process."""

    batch_sizes: BatchSizes = Field(
        default=[1, 64, 256], description="images a call, or texts, of each of which a call reads one word, and 35"
    )
    threads: list[Annotated[int, Field(gt=0)] | Literal["all"]] = Field(
        default=[1, "all"], min_length=1, description="numbers of threads"
    )
    backends: list[Backend] = Field(
        default=list(get_args(Backend)),
        min_length=1,
        description="contenders; one that is not installed, or has nothing to do in a net, is left out with a note",
    )
    rounds: int = Field(default=30, gt=0, description="interleaved samples of every contender")
    min_sample_s: float = Field(
        default=0.002, gt=0, description="calls are repeated within a sample until it lasts this long"
    )


class Case(Strict):
    """What all nets that are not trained say."""

    seed: Seed = Field(default=0, description="of weights and of which of them are left")
    batch_sizes: BatchSizes | None = Field(default=None, description="examples a call, where not those under `timing`")

    def nets(self) -> dict[str, dict[str, Any]]:
        """The nets of this case, each under what stands for its method: model, arguments and densities by layer."""
        raise NotImplementedError


class _Grid(Case):
    densities: list[Density] = Field(min_length=1, description="shares of the weights that are left, one net for each")

    def layer(self) -> tuple[str, dict[str, int]]:
        raise NotImplementedError

    def nets(self) -> dict[str, dict[str, Any]]:
        model, arguments = self.layer()
        return {
            f"density{density:g}": {"model": model, "arguments": arguments, "densities": {"layer": density}}
            for density in self.densities
        }

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(self.nets()) != len(self.densities):
            raise ValueError(f"densities: {self.densities} has duplicates")
        return self


class SyntheticNet(Case):
    """A whole net. Which weights are left is drawn at random, layer by layer."""

    model: NetName = Field(description="the net")
    width: float = Field(default=1.0, gt=0, description="scales the layers of vgglike, and of no other")
    densities: dict[str, Density] = Field(description="share of the weights that are left, for every layer")

    def nets(self) -> dict[str, dict[str, Any]]:
        arguments = {"width": self.width} if self.model == "vgglike" else {}
        return {RANDOM_MASKS: {"model": self.model, "arguments": arguments, "densities": self.densities}}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        layers = LAYERS[self.model]
        if set(self.densities) != set(layers):
            raise ValueError(f"densities: the layers of {self.model} are {', '.join(layers)}")
        if self.width != 1 and self.model != "vgglike":
            raise ValueError(f"width: {self.model} has but one")
        return self


class SyntheticConvolution(_Grid):
    """One 3x3 convolution with padding 1 at several densities."""

    channels: int = Field(gt=0, description="in and out")
    size: int = Field(gt=0, description="height and width of its input")

    def layer(self) -> tuple[str, dict[str, int]]:
        return "conv3x3", {"channels": self.channels, "size": self.size}


class SyntheticLinear(_Grid):
    """One linear layer at several densities."""

    inputs: int = Field(gt=0, description="input features")
    outputs: int = Field(gt=0, description="output features")

    def layer(self) -> tuple[str, dict[str, int]]:
        return "linear", {"inputs": self.inputs, "outputs": self.outputs}


class Synthetic(Strict):
    """Nets with random weights that are timed without having been trained, each under a name of its own."""

    nets: dict[Name, SyntheticNet] = Field(default={}, description="whole nets")
    convolutions: dict[Name, SyntheticConvolution] = Field(default={}, description="single convolutions")
    linear: dict[Name, SyntheticLinear] = Field(default={}, description="single linear layers")

    def names(self) -> list[str]:
        return [*self.nets, *self.convolutions, *self.linear]

    def cases(self) -> dict[str, Case]:
        return {**self.nets, **self.convolutions, **self.linear}

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.names())) != len(self.names()):
            raise ValueError(f"two cases have one name: {sorted(self.names())}")
        return self


class NetSpec(Strict):
    """A net that is timed by hand: the name it was asked for by, and what its file says of it."""

    experiment: str
    dataset: str
    model: str
    method: str
    seed: int
    timing: Timing

    def content(self) -> dict[str, Any]:
        """What is hashed and recorded."""
        return self.model_dump()


class CaseSpec(NetSpec):
    """A net that is timed without having been trained, as `Suite.spec_of` writes it and a job reads it."""

    dataset: Literal["random"] = "random"
    arguments: dict[str, int | float]
    densities: dict[str, Density]
