/* toy_oracle.h - the logits of the toy model after tokens [n], computed from the tokens alone. */
#ifndef TOY_ORACLE_H
#define TOY_ORACLE_H

#include <stdint.h>

#include "toy_model.h"

/* logits [TOY_VOCAB] after the last of tokens [n], 1 <= n <= TOY_CONTEXT */
static inline void toy_oracle(const int32_t *tokens, int n, float *logits)
{
    static int x[TOY_CONTEXT][TOY_CHANNELS], y[TOY_CHANNELS];
    for (int i = 0; i < n; i++)
        for (int c = 0; c < TOY_CHANNELS; c++) x[i][c] = (7 * tokens[i] + 3 * c * c + tokens[i] * c) % TOY_PRIME;
    for (int layer = 0; layer < TOY_LAYERS; layer++) {
        int past[TOY_CHANNELS] = {0};
        for (int i = 0; i < n; i++) {
            for (int c = 0; c < TOY_CHANNELS; c++) {
                past[c] = (31 * past[c] + x[i][c]) % TOY_PRIME;
                y[c] = (x[i][c] + past[c]) % TOY_PRIME;
            }
            for (int c = 0; c < TOY_CHANNELS; c++) x[i][c] = (y[(c + 1) % TOY_CHANNELS] + 1) % TOY_PRIME;
        }
    }
    for (int v = 0; v < TOY_VOCAB; v++) {
        int sum = 0;
        for (int c = 0; c < TOY_CHANNELS; c++) sum += x[n - 1][c] * ((v * (c + 2) + c) % 8);
        logits[v] = (float)(sum % TOY_PRIME);
    }
}

#endif
