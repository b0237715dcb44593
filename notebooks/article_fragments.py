"""The article's printed program fragments, quoted as they were printed, to be run and judged.

Source: a Chinese engineering article on QNN quantization for Hexagon NPUs, author unknown, undated.  The copy has
lost its indentation, which is restored here; not a character else is changed.  Nothing in this file is recommended.
"""

import numpy as np


# Section 1.2, "symmetric quantization"
def symmetric_quantize(x, num_bits=8):
    qmax = 2**(num_bits - 1) - 1 # 对于INT8是127
    scale = np.max(np.abs(x)) / qmax
    q = np.clip(np.round(x / scale), -qmax, qmax).astype(np.int8)
    return q, q.astype(np.float32) * scale, scale


# Section 1.2, "asymmetric quantization"
def asymmetric_quantize(x, num_bits=8):
    qmin, qmax = 0, 2**num_bits - 1 # 对于INT8是0-255
    scale = (np.max(x) - np.min(x)) / (qmax - qmin)
    zero_point = np.round(qmin - np.min(x) / scale)
    zero_point = np.clip(zero_point, qmin, qmax)
    q = np.clip(np.round(x / scale + zero_point), qmin, qmax).astype(np.uint8)
    return q, (q.astype(np.float32) - zero_point) * scale, scale, zero_point


# Section 2.1, as printed (the comments are the article's: "8-bit activations", "8-bit weights", "keep 32-bit biases",
# "use CLE").
CONVERTER = r"""qnn-onnx-converter \
--input_network model.onnx \
--output_path model_qnn.cpp \
--input_dim input 1,3,224,224 \
--input_list calibration/input_list.txt \
--act_bw 8 \ # 激活值8-bit
--weight_bw 8 \ # 权重8-bit
--bias_bw 32 \ # 偏置保持32-bit
--algorithms cle \ # 使用CLE优化
--use_per_channel_quantization
"""

# Section 2.2, as printed.
OVERRIDES = """{
"activation_encodings": {
"/model/layer.0/attention/Softmax_output_0": {
"dtype": "int16",
"is_symmetric": true
}
},
"param_encodings": {
"model.embed_tokens.weight": {
"dtype": "int8",
"is_symmetric": true
},
"model.layers.*.self_attn.q_proj.weight": {
"dtype": "int4",
"is_symmetric": true
}
},
"supergroups": [
{"op_list": ["Conv", "Relu"], "fuse": true}
]
}
"""


# Section 2.4, as printed (the comments say "calibrate" and "fine-tune").
QAT = """from aimet_torch.quantsim import QuantizationSimModel
sim = QuantizationSimModel(
    model=model,
    dummy_input=torch.randn(1,3,224,224),
    quant_scheme='tf_enhanced',
    default_output_bw=8,
    default_param_bw=8,
    config_file='qnn_config.json'
)
# 校准
sim.compute_encodings(forward_callback, None)
# 微调
optimizer = torch.optim.SGD(sim.model.parameters(), lr=0.001)
for epoch in range(10):
    for x, y in train_loader:
        optimizer.zero_grad()
        output = sim.model(x)
        loss = criterion(output, y)
        loss.backward()
        optimizer.step()
"""


# Section 3.2, as printed (the two strings say "compute-bound" and "bandwidth-bound").
class RooflineAnalyzer:
    def __init__(self, peak_tops=36, mem_bw=50):
        self.ridge_point = (peak_tops*1e12) / (mem_bw*1e9) # ops/byte
    def analyze_layer(self, name, ops, data_bytes):
        intensity = ops / data_bytes
        compute_time = ops / (self.peak_tops*1e12)
        memory_time = data_bytes / (self.mem_bw*1e9)
        if intensity >= self.ridge_point:
            return "计算瓶颈", compute_time
        else:
            return "带宽瓶颈", memory_time


# Section 2.3, as printed.  Kept as text, for it needs `nn`, `torch` and an `evaluate` that is printed nowhere.
SEARCHER = """class MixedPrecisionSearcher:
    def compute_layer_sensitivity(self, model, cal_loader):
        baseline = evaluate(model, cal_loader)
        sensitivities = {}
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            orig_weight = module.weight.clone()
            quant_weight = self._simulate_quant(orig_weight)
            module.weight.data = quant_weight
            metric = evaluate(model, cal_loader)
            sensitivities[name] = baseline - metric
            module.weight.data = orig_weight
        return sensitivities
    def _simulate_quant(self, tensor, bits=8):
        scale = tensor.abs().max() / (2**(bits-1)-1)
        return torch.clamp(tensor/scale, -2**(bits-1), 2**(bits-1)-1) * scale
"""


# Section 3.3, as printed: "operator fusion configuration", "memory layout", "zero-copy memory management".
GRAPH_CONFIG = """{
"graph_config": {
"enable_dlbc": true,
"tiling_config": {
"prefer_vtcm_tiling": true,
"max_tile_height": 64
}
}
}
"""

LAYOUT = "qnn-onnx-converter --input_layout input NHWC"

ZERO_COPY = """class ZeroCopyBuffer {
public:
    bool allocate(size_t size) {
        int ion_fd = open("/dev/ion", O_RDONLY);
        struct ion_allocation_data alloc = {
            .len = size,
            .heap_id_mask = ION_HEAP_SYSTEM_MASK,
            .flags = ION_FLAG_CACHED
        };
        ioctl(ion_fd, ION_IOC_ALLOC, &alloc);
        buffer_ = mmap(nullptr, size, PROT_READ|PROT_WRITE,
                       MAP_SHARED, alloc.fd, 0);
        return buffer_ != MAP_FAILED;
    }
};
"""
