"""Networks as pairs of pure functions, ``init(key) -> params`` and ``apply(params, inputs, key=None) -> outputs``.

With a key the network trains, and dropout is active; without one it is in inference mode. Parameters are nested dicts
and tuples with the usual names (``kernel`` of shape (inputs, outputs), ``bias``, ``scale``). Models with equal settings
compare equal, so a model can be a static argument of ``jax.jit``.
"""

from nnlearn.models.adapters import from_equinox as from_equinox
from nnlearn.models.adapters import from_linen as from_linen
from nnlearn.models.adapters import from_nnx as from_nnx
from nnlearn.models.attention import attention as attention
from nnlearn.models.attention import rotary as rotary
from nnlearn.models.convnet import convnet as convnet
from nnlearn.models.convnet import residual as residual
from nnlearn.models.convolution import average_pool as average_pool
from nnlearn.models.convolution import conv as conv
from nnlearn.models.convolution import global_average_pool as global_average_pool
from nnlearn.models.convolution import max_pool as max_pool
from nnlearn.models.embedding import embedding as embedding
from nnlearn.models.embedding import factorization_machine as factorization_machine
from nnlearn.models.factory import model_factory as model_factory
from nnlearn.models.generation import generate as generate
from nnlearn.models.graph import Graphs as Graphs
from nnlearn.models.graph import Sets as Sets
from nnlearn.models.graph import graph_network as graph_network
from nnlearn.models.graph import set_model as set_model
from nnlearn.models.layers import activation as activation
from nnlearn.models.layers import dense as dense
from nnlearn.models.layers import dropout as dropout
from nnlearn.models.layers import layer_norm as layer_norm
from nnlearn.models.layers import rms_norm as rms_norm
from nnlearn.models.layers import sequential as sequential
from nnlearn.models.mlp import mlp as mlp
from nnlearn.models.named import activation_function as activation_function
from nnlearn.models.named import initializer as initializer
from nnlearn.models.normalization import batch_norm as batch_norm
from nnlearn.models.normalization import group_norm as group_norm
from nnlearn.models.parameters import parameter_count as parameter_count
from nnlearn.models.recurrent import gru as gru
from nnlearn.models.recurrent import rnn as rnn
from nnlearn.models.spectrogram import log_mel_spectrogram as log_mel_spectrogram
from nnlearn.models.spectrogram import normalize_utterance as normalize_utterance
from nnlearn.models.spectrogram import spec_augment as spec_augment
from nnlearn.models.speech_encoder import Utterances as Utterances
from nnlearn.models.speech_encoder import log_mel_front_end as log_mel_front_end
from nnlearn.models.speech_encoder import speech_encoder as speech_encoder
from nnlearn.models.transformer import LanguageModel as LanguageModel
from nnlearn.models.transformer import encoder as encoder
from nnlearn.models.transformer import transformer as transformer
