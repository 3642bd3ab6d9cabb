/** A home has one owner at a time, and none that has died. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect } from 'chai';
import { homeOwner, isAlive, processName, takeHome } from '../../cli/home-lock.ts';
import { errorCode } from '../../config/errors.ts';

describe('home lock', () => {
  let home: string;
  beforeEach(() => {
    home = mkdtempSync(join(tmpdir(), 'cuda-nn-lock-'));
  });
  afterEach(() => rmSync(home, { recursive: true }));

  it('lets one process in, names it to the next, and is free again after release', () => {
    const lock = takeHome(home);
    expect(homeOwner(home)?.pid).to.equal(process.pid);
    try {
      takeHome(home);
      expect.fail('a second owner was let in');
    } catch (error) {
      expect(errorCode(error)).to.equal('ALREADY_UP');
      expect((error as Error).message).to.contain(String(process.pid));
    }
    lock.release();
    expect(homeOwner(home)).to.equal(undefined);
    takeHome(home).release();
    expect(readdirSync(home)).to.deep.equal([]);
  });

  it('takes a home over from a process that is gone', async () => {
    const child = spawn(process.execPath, ['-e', 'setInterval(() => {}, 1000)'], { stdio: 'ignore' });
    await once(child, 'spawn');
    const name = processName(child.pid!);
    expect(isAlive(name)).to.equal(true);
    writeFileSync(join(home, 'up.lock'), JSON.stringify(name));
    expect(homeOwner(home)?.pid).to.equal(child.pid);
    child.kill('SIGKILL');
    await once(child, 'exit');
    expect(isAlive(name)).to.equal(false);
    takeHome(home).release();
  });

  it('is not fooled by another process with the same id, nor by a damaged lock file', () => {
    writeFileSync(join(home, 'up.lock'), JSON.stringify({ pid: process.pid, startedAt: '1' }));
    const there = existsSync('/proc/self/stat');
    expect(homeOwner(home)?.pid).to.equal(there ? undefined : process.pid);
    writeFileSync(join(home, 'up.lock'), '{"pi');
    expect(homeOwner(home)).to.equal(undefined);
    takeHome(home).release();
  });
});
