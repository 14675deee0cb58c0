// The options of a call of either attention operation, as its struct in Python names them.
#pragma once

#include "cuda/attention.h"
#include "cuda_sim/calls.h"

namespace vivit::cuda::sim {

template <class Call>
void set_options(AttentionOptions& p, const Call& call, Run& run, bool writes_lse) {
    p.dtype = static_cast<DType>(call.dtype);
    p.lse = run.add<float>("lse", call.lse, writes_lse);
    p.mask = run.add<const bool>("mask", call.mask);
    p.cos = run.add<const float>("cos", call.cos), p.sin = run.add<const float>("sin", call.sin);
    p.scale = static_cast<float>(call.scale), p.softcap = static_cast<float>(call.softcap);
    p.seed = run.add<const int64_t>("seed", call.seed);
    if (p.seed != nullptr) set_dropout(p, call.dropout_p);
}

}  // namespace vivit::cuda::sim
