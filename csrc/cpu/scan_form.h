// What the kernels of a scan are compiled for: a write rule, with one kind of gate. A rule is a type with
//     READS     whether its key reads what it finds in the state and erases it (the delta rule), or only adds
//     LOW_RANK  whether a token also writes b (a^T S)^T, an erase that reads the state before its gate; of channel gates
#pragma once

namespace writesae::cpu {

template <class Rule, bool CHANNELS>
struct ScanForm {
  static constexpr bool READS = Rule::READS;
  static constexpr bool LOW_RANK = Rule::LOW_RANK;
  static constexpr int WRITES = LOW_RANK ? 2 : 1;  // a token's, the native one first
  static constexpr bool CHANNEL = CHANNELS;        // a gate of each channel, or one of the head
};

// run(form) with the form that a call asks for.
template <class Rule, class Run>
void of_gate(bool channels, const Run& run) {
  if constexpr (Rule::LOW_RANK) {
    run(ScanForm<Rule, true>());
  } else {
    if (channels) return run(ScanForm<Rule, true>());
    run(ScanForm<Rule, false>());
  }
}

}  // namespace writesae::cpu
