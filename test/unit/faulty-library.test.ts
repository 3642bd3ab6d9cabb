/** The libraries that break a device on purpose are the real ones in everything else, and load where there is no GPU. */
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { libraryPath, loadLibrary } from '../../cuda/device.ts';
import { ABI_VERSION } from '../../cuda/bindings.generated.ts';
import { whyNoFakeGpu } from '../support/fake-gpu.ts';
import { buildFaultyLibrary } from '../support/faulty-library.ts';

describe('the library that breaks a device on purpose', function () {
  this.timeout(120_000);

  for (const name of ['cpu', 'cuda'] as const) {
    it(`has every function of the real ${name} library, behind its own copy to the host`, function () {
      const reason = name === 'cpu' ? undefined : existsSync(libraryPath('cuda')) ? whyNoFakeGpu() : 'no CUDA library is built here';
      if (reason !== undefined || process.platform !== 'linux') {
        process.stderr.write(`    skipped: ${reason ?? 'this is not Linux'}\n`);
        this.skip();
      }
      const scratch = mkdtempSync(join(tmpdir(), 'faulty-'));
      const native = loadLibrary(buildFaultyLibrary(scratch, name));
      expect(native.nn_abi_version()).to.equal(ABI_VERSION);
      // Nothing to copy, and on a GPU no context either: the real function says so.
      expect(native.nn_copy_to_host(0, new Uint8Array(4), 0, 0)).to.equal(name === 'cpu' ? 0 : 1);
      rmSync(scratch, { recursive: true });
    });
  }
});
