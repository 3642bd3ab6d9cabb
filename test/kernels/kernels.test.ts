/** Every kernel of the table on every device and instruction set; see harness.ts for what is checked of each. */
import { describeKernels } from './harness.ts';
import { describeInstructionSets } from './products.ts';
import { cases } from './table.ts';

describeKernels('kernels', cases);
describeInstructionSets('kernels', cases);
