// What a low-rank erase adds to a scan's backward, with a gate of each channel; part of scan_backward_kernel.h.
//
// A token makes two writes, k_j u_j^T and b_j r_j^T, and two readings, o_j of q_j and r_j of a_j. Since r_j = a_j^T S_{j-1}, a_j
// is to the state what a query of the token before is: it sees the writes of i < j, decayed by D_{j-1,i}; the first of a piece
// sees S. With A^x_ji = a_j . D_{j-1,i} x_i (i < j) and B^x_ji = q_j . D_ji x_i (i <= j), for x of k and b:
//     dR = dR_given + E B D + (B^b)^T dO + (A^b)^T dR        one triangular solve, of 1 on the diagonal
//     dU = dU_given + E K D + (B^k)^T dO + (A^k)^T dR
//     dQ = G dO S^T + ...        dA = G_{j-1} dR S^T + ...        dK = E U D^T + ...        dB = E R D^T + ...
//     D <- G_L D + (G Q)^T dO + (G_{j-1} A)^T dR
// where a pair of tokens adds dO_j . u_i, dO_j . r_i, dR_j . u_i and dR_j . r_i times the other's row, decayed in between.

// A^k in kk, B^k in qk, A^b in ab, B^b in qb; k_end and b_end transposed in kt and bt.
inline void low_rank_products(Work& w, int64_t L, int64_t padded) {
  transpose(padded, w.pk, w.k_end, w.ld_k, w.kt, PC), transpose(padded, w.pk, w.b_end, w.ld_k, w.bt, PC);
  for (int64_t j = 0; j < padded; j++)
    for (float* products : {w.kk, w.qk, w.ab, w.qb}) zero(products + j * PC, j / STEP * STEP + STEP);
  float *const faded_k = w.x, *const faded_b = w.y;  // D_ji k_i, D_ji b_i
  for (int64_t i = 0; i < L; i++) {
    std::memcpy(faded_k, w.k + i * w.ld_k, w.pk * sizeof(float));
    std::memcpy(faded_b, w.b + i * w.ld_k, w.pk * sizeof(float));
    w.qk[i * PC + i] = dot(faded_k, w.q + i * w.ld_k, w.pk);
    w.qb[i * PC + i] = dot(faded_b, w.q + i * w.ld_k, w.pk);
    for (int64_t j = i + 1; j < L; j++) {
      const float *gates = w.gates + j * w.ld_k, *a = w.a + j * w.ld_k, *q = w.q + j * w.ld_k;
      Vec ak = {}, qk = {}, ab = {}, qb = {};
      for (int64_t c = 0; c < w.pk; c += LANES) {
        const Vec read = load(a + c), query = load(q + c), gate = load(gates + c);
        Vec k = load(faded_k + c), b = load(faded_b + c);
        ak += k * read, ab += b * read;
        k *= gate, b *= gate;
        qk += k * query, qb += b * query;
        store(faded_k + c, k), store(faded_b + c, b);
      }
      w.kk[j * PC + i] = sum(ak), w.ab[j * PC + i] = sum(ab);
      w.qk[j * PC + i] = sum(qk), w.qb[j * PC + i] = sum(qb);
    }
  }
}

// dR by back substitution, blocks of 8 rows, and what of it reaches dU.
inline void solve_erase(Work& w, const Params& p, const Item& item, int64_t t, int64_t L, int64_t padded) {
  multiply(w.bt, PC, w.d, w.ld_v, w.pk, w.dr, w.ld_v, padded, w.pv, false);
  load_values(w, item, p.d_erased, t, L, padded, w.dw);
  for (int64_t j = 0; j < padded; j++) add_scaled(w.dr + j * w.ld_v, w.dw + j * w.ld_v, 1.0f, w.pv);
  add_lower_transposed(w.qb, w.o, w.ld_v, padded, w.dr, w.pv);
  for (int64_t first = padded - 8; first >= 0; first -= 8) {
    const int64_t next = first + 8;
    multiply(w.ab + next * PC + first, PC, w.dr + next * w.ld_v, w.ld_v, padded - next, w.dr + first * w.ld_v, w.ld_v, 8,
             w.pv, true);
    for (int64_t i = next - 1; i >= first; i--)
      for (int64_t j = i + 1; j < next; j++) add_scaled(w.dr + i * w.ld_v, w.dr + j * w.ld_v, w.ab[j * PC + i], w.pv);
  }
  add_lower_transposed(w.kk, w.dr, w.ld_v, padded, w.du, w.pv);
}

// dbeta to rows of `partial`, dQ to x, dK to z, dA to xa, dB to zb, and dg to d_gates.
inline void reverse_low_rank(Work& w, const Params& p, const Item& item, const Piece& piece, int64_t padded, const float* s,
                             float* partial, int64_t stride) {
  const int64_t L = piece.length, t = item.origin + piece.start, ld = w.ld_k;
  transpose(padded, w.pv, w.dr, w.ld_v, w.drt, PC), transpose(padded, w.pv, w.r, w.ld_v, w.rt, PC);
  multiply(w.drt, PC, w.st, w.ld_k, w.pv, w.xa, w.ld_k, padded, w.pk, false);
  multiply(w.rt, PC, w.dt, w.ld_k, w.pv, w.zb, w.ld_k, padded, w.pk, false);
  multiply_lower(w.ot, w.rt, w.pv, padded, w.eb);
  multiply_lower(w.drt, w.ut, w.pv, padded, w.f);
  multiply_lower(w.drt, w.rt, w.pv, padded, w.fb);
  // Transposed, [i][j]: a row i goes over the later tokens. Of products nothing is needed any more.
  float *const on_qk = w.qk, *const on_qb = w.qb, *const on_ak = w.kk, *const on_ab = w.ab;
  for (int64_t j = 0; j < L; j++) {
    zero(w.line, w.pv);
    convert_in(p.in.v.type, p.in.v.at(item.b, t + j, item.h, item.column), w.line, w.V);
    partial[j * stride] = 0;
    partial[j * stride + 1] = dot(w.du + j * w.ld_v, w.line, w.pv);
    for (int64_t i = 0; i <= j; i++) {
      on_qk[i * PC + j] = w.e[j * PC + i], on_qb[i * PC + j] = w.eb[j * PC + i];
      on_ak[i * PC + j] = w.f[j * PC + i], on_ab[i * PC + j] = w.fb[j * PC + i];
    }
  }
  for (int64_t c = 0; c < w.pk; c += LANES) {
    const auto at = [&](float* rows, int64_t j) { return rows + j * ld + c; };
    Vec k[C], b[C], q[C], a[C], gate[C], dq[C], da[C], dk[C], db[C], dg[C], faded_k[C], faded_b[C];
    float on_state[LANES];
    for (int l = 0; l < LANES; l++) on_state[l] = dot(s + (c + l) * w.ld_v, w.d + (c + l) * w.ld_v, w.pv);
    const Vec whole = load(on_state) * load(at(w.sinces, L - 1));  // what decays through the whole piece
    Vec later = {}, earlier = {};                                  // what came before the piece, or goes beyond it
    for (int64_t l = L - 1; l >= 0; l--) {
      k[l] = load(at(w.k, l)), b[l] = load(at(w.b, l)), gate[l] = load(at(w.gates, l));
      q[l] = load(at(w.q, l)), a[l] = load(at(w.a, l));
      dq[l] = load(at(w.x, l)) * load(at(w.sinces, l));
      later += q[l] * dq[l];
      dg[l] = whole + later;
      da[l] = load(at(w.xa, l));
      if (l > 0) da[l] *= load(at(w.sinces, l - 1));
      later += a[l] * da[l];  // before its own gate
    }
    for (int64_t l = 0; l < L; l++) {
      dg[l] += earlier;
      dk[l] = load(at(w.z, l)) * load(at(w.untils, l));
      db[l] = load(at(w.zb, l));
      if (l + 1 < L) db[l] *= load(at(w.untils, l));  // 1 at the last, whose erase stays
      earlier += k[l] * dk[l] + b[l] * db[l];
    }
    for (int64_t i = 0; i < L; i++) {
      const float *qk = on_qk + i * PC, *qb = on_qb + i * PC, *ak = on_ak + i * PC, *ab = on_ab + i * PC;
      faded_k[i] = k[i], faded_b[i] = b[i];
      dq[i] += qk[i] * k[i] + qb[i] * b[i];
      for (int64_t j = i + 1; j < L; j++) {
        da[j] += ak[j] * faded_k[j - 1] + ab[j] * faded_b[j - 1];
        faded_k[j] = faded_k[j - 1] * gate[j], faded_b[j] = faded_b[j - 1] * gate[j];
        dq[j] += qk[j] * faded_k[j] + qb[j] * faded_b[j];
      }
      Vec rest_k = {}, rest_b = {};  // of a write i that later tokens read, taken back to where it was made
      for (int64_t l = L - 1; l > i; l--) {
        rest_k = (rest_k + qk[l] * q[l]) * gate[l], rest_b = (rest_b + qb[l] * q[l]) * gate[l];
        dg[l] += faded_k[l - 1] * rest_k + faded_b[l - 1] * rest_b;
        rest_k += ak[l] * a[l], rest_b += ab[l] * a[l];
      }
      dk[i] += qk[i] * q[i] + rest_k;
      db[i] += qb[i] * q[i] + rest_b;
    }
    for (int64_t l = 0; l < L; l++) {
      store(at(w.x, l), dq[l]), store(at(w.xa, l), da[l]), store(at(w.d_gates, l), dg[l]);
      store(at(w.z, l), dk[l]), store(at(w.zb, l), db[l]);
    }
  }
}
