// Whether a quantization may wait until the whole GPU is free for it (core::QuantizeArgs), for this
// process. FP8_WHOLE_GPU_LAUNCHES says it, 1 or 0; unset, it may unless WORLD_SIZE names more than
// one process: it would wait for every collective that runs beside it.
#pragma once

namespace fp8 {

// One relaxed load.
bool whole_gpu_launches();

// No more from now on, unless FP8_WHOLE_GPU_LAUNCHES is set.
void spare_collectives();

}  // namespace fp8
