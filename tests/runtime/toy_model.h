/* toy_model.h - the sizes of the toy model; toy_artifact.py reads them from here. */
#ifndef TOY_MODEL_H
#define TOY_MODEL_H

enum {
    TOY_VOCAB = 61,
    TOY_CHANNELS = 16,
    TOY_LAYERS = 2,
    TOY_PRIME = 1009,
    TOY_CONTEXT = 30,
    TOY_PAGE_TOKENS = 4,
    TOY_PAGES = 8,        /* of a sequence */
    TOY_PAGE_BYTES = 512, /* layers * page tokens * channels * 4 */
    TOY_POISON = 60,      /* a token that makes a kernel fail */
    TOY_EOS = 7,
    TOY_TILE = 24,     /* numbers of a tile, where there is a tower */
    TOY_TILE_ROWS = 3, /* that it makes of one */
};

#endif
