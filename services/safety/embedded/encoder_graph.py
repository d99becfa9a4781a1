"""The encoder with its heads as an ONNX graph, put together from weights alone: no torch is needed to build it.

The graph is BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805; post-layer-norm, GELU) with mean pooling as
in Sentence-BERT (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084) and one linear layer for all heads. A
test compares it with transformers' own forward pass.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20  # the first with Gelu

Weights = dict[str, npt.NDArray[np.float32]]


class Shape(NamedTuple):
    """The sizes of the encoder that the weights do not tell."""

    layers: int
    heads: int
    epsilon: float


class _Graph:
    """Nodes and constants under construction; every method returns the name of its result."""

    def __init__(self, weights: Weights) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.weights = weights

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[name])

    def half(self, name: str) -> str:
        return self.constant(name, self.weights[name].astype(np.float16))

    def linear(self, name: str, x: str, output: str | None = None) -> str:
        kernel = self.constant(f"{name}.weight", self.weights[f"{name}.weight"].T)
        return self.op("Add", self.op("MatMul", x, kernel), self.weight(f"{name}.bias"), output=output)

    def layer_norm(self, name: str, x: str, epsilon: float) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def build_graph(weights: Weights, shape: Shape) -> onnx.ModelProto:
    """The model as ONNX.

    Args:
        weights: BERT's tensors by transformers' names, and ``head.weight`` (K, d) with ``head.bias`` (K,).
        shape: layers, attention heads and the layer norms' epsilon.

    Returns:
        A model with input ``input_ids`` (n, t) int64, texts of one length without padding, and output ``logits``
        (n, K) float32.
    """
    graph = _Graph(weights)
    width = weights["head.weight"].shape[1]
    graph.constant("scale", np.array((width / shape.heads) ** -0.5, np.float32))
    graph.constant("split", np.array([0, 0, shape.heads, width // shape.heads], np.int64))
    graph.constant("joined", np.array([0, 0, width], np.int64))
    hidden = _embeddings(graph, shape.epsilon)
    for layer in range(shape.layers):
        hidden = _layer(graph, f"encoder.layer.{layer}", hidden, shape.epsilon)
    positions = graph.constant("positions", np.array([1], np.int64))
    pooled = graph.op("ReduceMean", hidden, positions, keepdims=0)
    graph.linear("head", pooled, output="logits")
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "t"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", weights["head.weight"].shape[0]])]
    body = helper.make_graph(graph.nodes, "encoder", inputs, outputs, list(graph.constants.values()))
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _embeddings(graph: _Graph, epsilon: float) -> str:
    """Word, position and (always the first) segment embeddings (n, t, d)."""
    table = graph.half("embeddings.word_embeddings.weight")  # half of the file, and read one row at a time
    words = graph.op("Cast", graph.op("Gather", table, "input_ids"), to=TensorProto.FLOAT)
    length = graph.op("Shape", "input_ids", start=1, end=2)
    first = graph.constant("first", np.array([0], np.int64))
    positions = graph.op("Slice", graph.weight("embeddings.position_embeddings.weight"), first, length, first)
    segment = graph.constant("segment", graph.weights["embeddings.token_type_embeddings.weight"][0])
    total = graph.op("Add", graph.op("Add", words, positions), segment)
    return graph.layer_norm("embeddings.LayerNorm", total, epsilon)


def _layer(graph: _Graph, name: str, hidden: str, epsilon: float) -> str:
    """One transformer layer (n, t, d) -> (n, t, d)."""
    attended = _attention(graph, f"{name}.attention.self", hidden)
    attended = graph.linear(f"{name}.attention.output.dense", attended)
    hidden = graph.layer_norm(f"{name}.attention.output.LayerNorm", graph.op("Add", attended, hidden), epsilon)
    wide = graph.op("Gelu", graph.linear(f"{name}.intermediate.dense", hidden))
    narrow = graph.linear(f"{name}.output.dense", wide)
    return graph.layer_norm(f"{name}.output.LayerNorm", graph.op("Add", narrow, hidden), epsilon)


def _attention(graph: _Graph, name: str, hidden: str) -> str:
    """Scaled dot-product attention."""

    def heads(part: str, perm: list[int]) -> str:
        split = graph.op("Reshape", graph.linear(f"{name}.{part}", hidden), "split")
        return graph.op("Transpose", split, perm=perm)

    query = graph.op("Mul", heads("query", [0, 2, 1, 3]), "scale")
    scores = graph.op("MatMul", query, heads("key", [0, 2, 3, 1]))
    shares = graph.op("Softmax", scores, axis=-1)
    mixed = graph.op("MatMul", shares, heads("value", [0, 2, 1, 3]))
    return graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), "joined")
