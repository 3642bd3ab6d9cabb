/** The library that breaks a GPU on purpose is the real one in everything else, and loads where there is no GPU. */
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { libraryPath, loadLibrary } from '../../cuda/device.ts';
import { ABI_VERSION } from '../../cuda/bindings.generated.ts';
import { whyNoFakeGpu } from '../support/fake-gpu.ts';
import { buildFaultyLibrary } from '../support/faulty-library.ts';

describe('the library that breaks a GPU on purpose', function () {
  this.timeout(120_000);

  it('has every function of the real one, behind its own copy to the host', function () {
    const reason = existsSync(libraryPath('cuda')) ? whyNoFakeGpu() : 'no CUDA library is built here';
    if (reason !== undefined) {
      process.stderr.write(`    skipped: ${reason}\n`);
      this.skip();
    }
    const scratch = mkdtempSync(join(tmpdir(), 'faulty-'));
    const native = loadLibrary(buildFaultyLibrary(scratch));
    expect(native.nn_abi_version()).to.equal(ABI_VERSION);
    // Without a context the real function says what is missing.
    expect(native.nn_copy_to_host(0, new Uint8Array(4), 0, 4)).to.equal(1);
    const said = new Uint8Array(200);
    native.nn_error_message(0, said, said.length);
    expect(Buffer.from(said).toString('latin1')).to.match(/^nn_copy_to_host: no context/);
    rmSync(scratch, { recursive: true });
  });
});
