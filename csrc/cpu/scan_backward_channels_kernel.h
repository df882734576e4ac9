// What a gate of each channel changes in the arithmetic of a scan's backward; part of scan_backward_kernel.h.
//
// G_j, E_j and D_ji are diagonal matrices of K, so the products of keys and queries inside a piece are no matrix products:
//     A_ji = k_j . D_ji k_i      B_ji = q_j . D_ji k_i
// are summed pair by pair, C / 2 pairs a token. Backwards, with dB = tril(dO U^T) and dA = -beta tril(dU U^T, -1), a pair adds
//     dB_ji D_ji k_i to dq_j,  dA_ji D_ji k_i to dk_j,  D_ji y_ji to dk_i,  and k_i D_ji y_ji to dg_l for i < l <= j
// with y_ji = dB_ji q_j + dA_ji k_j. Channels do not meet there, so a vector of them takes all pairs in one go: forwards
// over j for D_ji k_i, backwards for the sums of D_jl y_ji over j >= l. Gates only ever multiply, as everywhere here.

// A in kk, B in qk; k_end transposed in kt.
template <class Form>
inline void channel_products(Work& w, int64_t L, int64_t padded) {
  transpose(padded, w.pk, w.k_end, w.ld_k, w.kt, PC);
  for (int64_t j = 0; j < padded; j++) {
    const int64_t end = j / STEP * STEP + STEP;
    zero(w.qk + j * PC, end);
    if constexpr (Form::READS) zero(w.kk + j * PC, end);
  }
  float* const faded = w.x;  // D_ji k_i
  for (int64_t i = 0; i < L; i++) {
    std::memcpy(faded, w.k + i * w.ld_k, w.pk * sizeof(float));
    w.qk[i * PC + i] = dot(faded, w.q + i * w.ld_k, w.pk);
    for (int64_t j = i + 1; j < L; j++) {
      const float *gates = w.gates + j * w.ld_k, *k = w.k + j * w.ld_k, *q = w.q + j * w.ld_k;
      Vec kk = {}, qk = {};
      for (int64_t c = 0; c < w.pk; c += LANES) {
        const Vec x = load(faded + c) * load(gates + c);
        store(faded + c, x);
        qk += x * load(q + c);
        if constexpr (Form::READS) kk += x * load(k + c);
      }
      w.qk[j * PC + i] = sum(qk);
      if constexpr (Form::READS) w.kk[j * PC + i] = sum(kk);
    }
  }
}

// dbeta to rows of `partial`, dQ to x, dK to z, and dg to d_gates.
template <class Form>
inline void reverse_channels(Work& w, const Params& p, const Item& item, const Piece& piece, int64_t padded, const float* s,
                             float* partial, int64_t stride) {
  const int64_t L = piece.length, t = item.origin + piece.start, ld = w.ld_k;
  float *const db = w.et, *const da = w.reach;  // transposed: [i][j]
  for (int64_t j = 0; j < L; j++) {
    zero(w.line, w.pv);
    convert_in(p.in.v.type, p.in.v.at(item.b, t + j, item.h, item.column), w.line, w.V);
    float d_beta = dot(w.du + j * w.ld_v, w.line, w.pv);
    if constexpr (Form::READS) {
      float* const y = w.y + j * ld;  // G_j S dU_j, then what it adds to dK
      multiply_rows(y, w.sinces + j * ld, w.pk, y);
      d_beta -= dot(w.k + j * ld, y, w.pk);
      for (int64_t i = 0; i < j; i++) d_beta -= w.kk[j * PC + i] * w.f[j * PC + i];
      scale_row(y, -w.beta[j], w.pk);
      for (int64_t i = 0; i < j; i++) da[i * PC + j] = -w.beta[j] * w.f[j * PC + i];
    }
    for (int64_t i = 0; i <= j; i++) db[i * PC + j] = w.e[j * PC + i];
    partial[j * stride] = 0;
    partial[j * stride + 1] = d_beta;
  }
  for (int64_t c = 0; c < w.pk; c += LANES) {
    const auto at = [&](float* rows, int64_t j) { return rows + j * ld + c; };
    Vec k[C], q[C], gate[C], dq[C], dk[C], dg[C], faded[C];
    float on_state[LANES];
    for (int l = 0; l < LANES; l++) on_state[l] = dot(s + (c + l) * w.ld_v, w.d + (c + l) * w.ld_v, w.pv);
    const Vec whole = load(on_state) * load(at(w.sinces, L - 1));  // what decays through the whole piece
    Vec later = {}, earlier = {};                                  // what came before the piece, or goes beyond it
    for (int64_t l = L - 1; l >= 0; l--) {
      k[l] = load(at(w.k, l)), q[l] = load(at(w.q, l)), gate[l] = load(at(w.gates, l));
      dq[l] = load(at(w.x, l)) * load(at(w.sinces, l));
      later += q[l] * dq[l];
      if constexpr (Form::READS) later += k[l] * load(at(w.y, l));
      dg[l] = whole + later;
    }
    for (int64_t l = 0; l < L; l++) {
      dg[l] += earlier;
      dk[l] = load(at(w.z, l)) * load(at(w.untils, l));
      earlier += k[l] * dk[l];
      if constexpr (Form::READS) dk[l] += load(at(w.y, l));
    }
    for (int64_t i = 0; i < L; i++) {
      const float *b = db + i * PC, *a = da + i * PC;
      faded[i] = k[i];
      dq[i] += b[i] * k[i];
      for (int64_t j = i + 1; j < L; j++) {
        faded[j] = faded[j - 1] * gate[j];
        dq[j] += b[j] * faded[j];
        if constexpr (Form::READS) dk[j] += a[j] * faded[j];
      }
      Vec rest = {};
      for (int64_t l = L - 1; l > i; l--) {
        Vec y = b[l] * q[l];
        if constexpr (Form::READS) y += a[l] * k[l];
        rest = (rest + y) * gate[l];
        dg[l] += faded[l - 1] * rest;
      }
      dk[i] += b[i] * q[i] + rest;
    }
    for (int64_t l = 0; l < L; l++) store(at(w.x, l), dq[l]), store(at(w.z, l), dk[l]), store(at(w.d_gates, l), dg[l]);
  }
}
