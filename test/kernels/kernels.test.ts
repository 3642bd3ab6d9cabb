/** Every kernel of the table on every device; see harness.ts for what is checked of each. */
import { describeKernels } from './harness.ts';
import { cases } from './table.ts';

describeKernels('kernels', cases);
