"""What is computed: Flax NNX modules of the Llama 4 family. They know dims, not devices.

One legend for the whole project; array names carry it as a suffix (`tokens_BS`, `gate_EDF`):

    B  batch rows        D  model width        E  experts          M  media tiles
    S  sequence          N  query heads        F  ffn width        P  patches per tile
    T  tokens (B x S)    K  key/value heads    V  vocabulary       C  attention chunk
    R  repeats of the    H  head width         A  assignments      W  vision width
       super-block                                (T x top-k)
"""
