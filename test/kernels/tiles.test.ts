/** The tensor-core kernels in bf16 at the borders of their tiles (tiles.ts), on a GPU; skips loudly without one. */
import { describeInBf16 } from './harness.ts';
import { TILE_TESTS, tileCases } from './tiles.ts';

describeInBf16('tensor-core tiles', TILE_TESTS, tileCases);
