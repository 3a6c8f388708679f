// A decoder for transformers of the llama kind: RMSNorm, rotary positions, grouped-query attention with a cache of keys and
// values, SwiGLU. What differs between families is data: which weights there are, the rotary frequencies, the windows.
//
// Results do not depend on the number of threads, on chunks, on how sequences are batched, or on what of a prompt was in the
// cache already. All instruction sets with fused multiply-adds give the same bits, but for matrices of bfloat16 values where
// inputs may be rounded: "bf16" and "amx" multiply those in pairs. "baseline" has no fused multiply-add; attention and products
// of plain values, which use it, then agree with the others to rounding.
#ifndef FEATHERWEIGHT_DECODER_H
#define FEATHERWEIGHT_DECODER_H

#include "product.h"

typedef struct fw_layer {
  const float* attention_norm;  // [hidden]
  const float* mlp_norm;        // [hidden]
  const float* query_norm;      // [head_dim] or null: RMSNorm of every query head
  const float* key_norm;        // [head_dim] or null
  const fw_linear *query, *key, *value, *output, *gate, *up, *down;
  int64_t window;               // positions a token sees, itself included; 0: all
} fw_layer;

typedef struct fw_decoder_settings {
  int64_t layers, hidden, heads, kv_heads, head_dim, ffn, vocabulary;
  int64_t context;              // most tokens of a sequence
  int64_t sequences;            // most sequences at a time
  int64_t chunk;                // most tokens in one pass through the network
  const fw_layer* layer;        // [layers]
  const void* embedding;        // operand [vocabulary, hidden]
  const float* norm;            // [hidden]
  const fw_linear* head;        // [vocabulary, hidden]
  const float* frequencies;     // [head_dim / 2] radians a position
  double rope_scale;            // factor of cosines and sines
  double dynamic_base;          // dynamic NTK scaling beyond `dynamic_length` positions: base and factor; 0: none
  double dynamic_factor;
  int64_t dynamic_length;
  double epsilon;
  int32_t cache;                // FW_FLOAT16, or FW_INT8 with a scale for every head and token
  int32_t precision;            // fw_precision
  int32_t threads;
  int32_t reserved;
} fw_decoder_settings;

typedef struct fw_sampling {
  double temperature;           // 0: the likeliest token, the lowest of equals
  double top_p;                 // 1: all
  double min_p;                 // 0: all
  double repetition_penalty;    // 1: none
  int64_t top_k;                // 0: all
  uint64_t seed;
} fw_sampling;

typedef struct fw_decoder_stats {
  int64_t prompt_tokens, reused_tokens, new_tokens, passes;
  double prompt_seconds, decode_seconds;      // wall time of passes, sampling of the second included
  double linear_seconds, attention_seconds;   // of both, in matrix products and in attention
  int64_t cache_bytes;
} fw_decoder_stats;

// Called after every step with its tokens, [count], -1 for sequences that have ended. Anything but 0 ends the generation.
typedef int32_t (*fw_on_tokens)(const int32_t* tokens, void* context);

typedef struct fw_generation {
  int64_t count;                // sequences 0 .. count - 1 of the decoder
  const int32_t* prompts;       // one behind the other
  const int64_t* lengths;       // [count]
  const fw_sampling* sampling;  // [count]
  const int32_t* stops;         // tokens that end a sequence; they are not part of the result
  int64_t stop_count;
  int64_t most;                 // new tokens of a sequence
  int32_t* made;                // [count, most]
  int64_t* made_lengths;        // [count]
  fw_on_tokens on_tokens;       // or null
  void* context;
} fw_generation;

typedef struct fw_decoder fw_decoder;

// What `settings` points to must stay alive; the arrays of fw_layer are copied.
FW_API int32_t fw_decoder_new(const fw_decoder_settings* settings, fw_decoder** decoder);
FW_API void fw_decoder_free(fw_decoder* decoder);

// Tokens that sequence has in the cache; keep only the first `length` of them.
FW_API int64_t fw_decoder_length(const fw_decoder* decoder, int64_t sequence);
// Memory that no sequence needs any more is given back to the system, here and at the end of every call.
FW_API int32_t fw_decoder_truncate(fw_decoder* decoder, int64_t sequence, int64_t length);
// Keep what the cache has in common with `tokens`, and return how many tokens that are.
FW_API int64_t fw_decoder_keep_prefix(fw_decoder* decoder, int64_t sequence, const int32_t* tokens, int64_t count);

// Put tokens behind those of a sequence. logits: null, [vocabulary] of the last one, or with `all` [count, vocabulary].
FW_API int32_t fw_decoder_feed(fw_decoder* decoder, int64_t sequence, const int32_t* tokens, int64_t count, float* logits,
                               int32_t all);
// One token for each of `count` different sequences; logits [count, vocabulary].
FW_API int32_t fw_decoder_step(fw_decoder* decoder, const int64_t* sequences, const int32_t* tokens, int64_t count,
                               float* logits);

// Prompts in, tokens out. A prompt that begins like what its sequence has in the cache is continued from there. Ends at a
// stop token, after `most` tokens, or at the end of the context. FW_NON_FINITE if logits are.
FW_API int32_t fw_decoder_generate(fw_decoder* decoder, const fw_generation* generation);

// From another thread: with `stop` the call in progress ends as soon as it can, within a layer, and it and all further ones
// return FW_STOPPED, until this is called with 0. Tokens that have gone through the network stay in the cache.
FW_API void fw_decoder_stop(fw_decoder* decoder, int32_t stop);

FW_API void fw_decoder_get_stats(fw_decoder* decoder, fw_decoder_stats* stats, int32_t reset);

// The token that `sampling` takes after `history`, or -1 if a logit is NaN or +Inf, or all are -Inf, or a setting is none:
// temperature, top_k >= 0, 0 <= top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0. `drawn` random numbers
// of the seed have been used before.
FW_API int32_t fw_sample(const float* logits, int64_t vocabulary, const int32_t* history, int64_t history_length,
                         const fw_sampling* sampling, uint64_t drawn);

#endif
